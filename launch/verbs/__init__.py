"""What each verb of the command line does; `launch/commands/` has their flags."""
