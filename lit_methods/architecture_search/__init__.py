"""Networks whose cells are searched by gradients."""
