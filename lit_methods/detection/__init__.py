"""Detection of objects in images: boxes, matching, set losses, cascaded heads, and the techniques that share them."""
