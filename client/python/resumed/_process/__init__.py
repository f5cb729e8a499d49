"""What is done to the process as a whole: state after fork(), and core dumps."""
