"""The HTTP surface: submit, status, cancel, health. One file per noun; `app.py` composes them."""
