"""`resumed demo`: a store and two frontends on this machine."""
