"""The process as a whole: state after fork(), and core dumps."""
