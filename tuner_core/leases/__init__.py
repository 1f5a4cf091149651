"""The lease state machine of a job that is sharded over several instances: no I/O, no clock, no transport."""
