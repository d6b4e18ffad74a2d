"""What `make gpu` runs on a machine with a GPU: build, verify, test and measure, in one bounded run."""
