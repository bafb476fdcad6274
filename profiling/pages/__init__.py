"""A recorded run as files to look at: the HTML report, a Perfetto trace."""
