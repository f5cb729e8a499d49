#!lua flags=allow-oom,allow-cross-slot-keys
-- Return how long a tombstone stays, for a reader of the log. It writes nothing, but a replica refuses it: see get.lua.
-- KEYS: the session.
-- ARGV: as those of get.lua, all unused.
-- Returns: milliseconds left, or false if there is no tombstone.
if redis.call('GET', KEYS[1]) ~= '' then return false end
return redis.call('PTTL', KEYS[1])
