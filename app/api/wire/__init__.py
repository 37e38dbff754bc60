"""Connections, and the bodies of requests and answers as they cross them."""
