"""What each verb of the command line does; `launch/cli.py` has their flags."""
