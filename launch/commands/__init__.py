"""The command line of each verb: its flags, its help, and what they may not be together."""
