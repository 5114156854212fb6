"""One file a technique, called as its golden test is: a package, so that both names may stand side by side."""
