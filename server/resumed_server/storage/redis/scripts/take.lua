#!lua flags=allow-oom,allow-cross-slot-keys
-- Look a session up and leave a tombstone in its place, until the session's own expiry.
-- KEYS: the session.
-- ARGV: namespace, its mark or '?', length of the log, keys of streams.
-- Returns: {value, milliseconds left}, or false.
-- include namespace_mark_{topology}.lua
-- include log_change.lua
local value = redis.call('GET', KEYS[1])
if not value or value == '' then return false end
local mark = namespace_mark(ARGV[1], ARGV[2], 4)
if type(mark) == 'table' then return mark end
if is_purged(value, mark) then return false end
local ttl = redis.call('PTTL', KEYS[1])
local failed = log_change('-', 3)
if failed then return failed end
redis.call('SET', KEYS[1], '', 'KEEPTTL')
return {string.sub(value, MARK_DIGITS + 1), ttl}
