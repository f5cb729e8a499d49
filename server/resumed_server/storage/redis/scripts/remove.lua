#!lua flags=allow-oom,allow-cross-slot-keys
-- Leave a tombstone: until the session's own expiry, or for a minute if there is no session. It is written even if one
-- is there already, so that WAIT has something for replicas to acknowledge.
-- KEYS: the session.
-- ARGV: namespace, its mark or '?', '0' to leave no tombstone where there is nothing, length of the log, keys of streams.
-- Returns: 1 if a session was there, 0 if there was nothing, false if there was a tombstone already; -1 if there was
--          nothing and no tombstone was left.
-- include namespace_mark_{topology}.lua
-- include log_change.lua
local UNKNOWN_TOMBSTONE_MILLISECONDS = 60000

local value = redis.call('GET', KEYS[1])
if value == '' then
  redis.call('SET', KEYS[1], '', 'KEEPTTL')
  return false
end
local mark = namespace_mark(ARGV[1], ARGV[2], 5)
if type(mark) == 'table' then return mark end
local there = value and not is_purged(value, mark)
if not there and ARGV[3] == '0' then return -1 end
local failed = log_change('-', 4)
if failed then return failed end
if there then
  redis.call('SET', KEYS[1], '', 'KEEPTTL')
  return 1
end
redis.call('SET', KEYS[1], '', 'PX', UNKNOWN_TOMBSTONE_MILLISECONDS)
return 0
