"""Sessions as a service: many readers and writers of one model, by HTTP."""
