"""Learning from few labels and many images without one."""
