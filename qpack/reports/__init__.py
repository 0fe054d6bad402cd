"""What people read about a checkpoint: `text` for the terminal, `page` for a browser."""
