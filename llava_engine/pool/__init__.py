"""Workers, their memory, and the routing of requests to them."""
