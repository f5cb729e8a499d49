#!lua flags=allow-oom,allow-cross-slot-keys
-- Look a session up. It writes nothing, but without `no-writes` a replica refuses it: a replica may still have sessions
-- that its primary has removed.
-- KEYS: the session.
-- ARGV: namespace, its mark or '?', length of the log (unused), keys of streams.
-- Returns: {value, milliseconds left}, or false.
-- include namespace_mark_{topology}.lua
local value = redis.call('GET', KEYS[1])
if not value or value == '' then return false end
local mark = namespace_mark(ARGV[1], ARGV[2], 4)
if type(mark) == 'table' then return mark end
if is_purged(value, mark) then return false end
return {string.sub(value, MARK_DIGITS + 1), redis.call('PTTL', KEYS[1])}
