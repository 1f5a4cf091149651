"""What people see: the live view on a terminal, plain lines elsewhere, tables at the end."""
