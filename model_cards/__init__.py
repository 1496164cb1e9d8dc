"""What readers of the Hub see: model cards."""
