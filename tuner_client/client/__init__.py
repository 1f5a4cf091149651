"""What a client of one server can do, by what it does it with: the server, models, jobs, records."""
