"""What `attention_view` shows: attention maps, what follows from them, and the page."""
