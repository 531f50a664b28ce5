"""What the losses are good for: networks trained with each of them, and the page that tells of it."""
