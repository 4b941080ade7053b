"""Tables, pages and cards."""
