#!lua flags=allow-cross-slot-keys
-- Store a session. A full Redis refuses this script, as it has no `allow-oom`.
-- A session lives no longer than a week from its issue; after that, the mark that would refuse it may be forgotten.
-- KEYS: the session.
-- ARGV: namespace, its mark or '?', value, milliseconds to live, time of issue in microseconds or '' for now,
--       length of the log, keys of streams.
-- Returns: milliseconds to live; {milliseconds left} if the same value is there already; 0 if the session is over;
--          -1 if the key has another value or a tombstone, or the session was issued before the mark.
-- include namespace_mark_{topology}.lua
-- include log_change.lua
local LONGEST_TTL_MICROSECONDS = 604800e6

local mark = namespace_mark(ARGV[1], ARGV[2], 7)
if type(mark) == 'table' then return mark end
local value = redis.call('GET', KEYS[1])
if value and not is_purged(value, mark) then
  return string.sub(value, MARK_DIGITS + 1) == ARGV[3] and {redis.call('PTTL', KEYS[1])} or -1
end
local time = redis.call('TIME')
local now = time[1] * 1e6 + time[2]
local issued = string.format('%0' .. TIME_DIGITS .. '.0f', now)
if ARGV[5] ~= '' and ARGV[5] < issued then issued = ARGV[5] end
if issued < string.sub(mark, 1, TIME_DIGITS) then return -1 end
local ttl = math.min(tonumber(ARGV[4]), math.floor((issued + LONGEST_TTL_MICROSECONDS - now) / 1000))
if ttl <= 0 then return 0 end
local failed = log_change('+', 6)
if failed then return failed end
local epoch = mark == '' and string.rep('0', EPOCH_DIGITS) or string.sub(mark, TIME_DIGITS + 1)
redis.call('SET', KEYS[1], issued .. epoch .. ARGV[3], 'PX', string.format('%.0f', ttl))
return ttl
