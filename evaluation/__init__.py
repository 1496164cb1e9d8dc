"""What survives compression, and what it costs."""
