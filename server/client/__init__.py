"""The command line as a client: of a server somewhere, or of one inside this process."""
