#!lua flags=allow-oom
-- Add a lasting removal to the index on a node that does not have its session.
-- KEYS: the set beside a stream.
-- ARGV: key of the session, milliseconds.
-- Returns: 1.
-- include removals.lua
return add_removal(KEYS[1], ARGV[1], tonumber(ARGV[2])) or 1
