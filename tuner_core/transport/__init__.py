"""How a client reaches a server: connection options, channels, deadlines."""
