#!lua flags=allow-oom,allow-cross-slot-keys
-- Leave a tombstone: until the session's own expiry, or for a minute if there is no session, and for the time of a lasting
-- removal at least. It is written even if one is there already, so that WAIT has something for replicas to acknowledge.
-- KEYS: the session.
-- ARGV: namespace, its mark or '?', '0' to leave no tombstone where there is nothing, milliseconds of a lasting removal
--       or '0', length of the log, keys of streams.
-- Returns: 1 if a session was there, 0 if there was nothing, false if there was a tombstone already; -1 if there was
--          nothing and no tombstone was left.
-- include namespace_mark_{topology}.lua
-- include log_change.lua
-- include removals.lua
local UNKNOWN_TOMBSTONE_MILLISECONDS = 60000
local LOG = 5

-- Return whether the index on this node has the tombstone.
local function is_lasting()
  for each = LOG + 1, #ARGV do
    local ends = redis.pcall('ZSCORE', removals_of(ARGV[each], ARGV[1]), KEYS[1])
    if ends and type(ends) ~= 'table' then return true end
  end
end

-- Add the tombstone to the index, to the first set that is on this node. Return an error (a table) if there is none.
local function index_removal(ttl)
  local failed
  for each = LOG + 1, #ARGV do
    failed = add_removal(removals_of(ARGV[each], ARGV[1]), KEYS[1], ttl)
    if not failed then return end
  end
  return failed
end

local value, ttl = redis.call('GET', KEYS[1]), tonumber(ARGV[4])
local lasting, removed = ttl > 0, value == ''
local left = value and redis.call('PTTL', KEYS[1]) or 0
if removed and (not lasting or (ttl <= left and is_lasting())) then
  redis.call('SET', KEYS[1], '', 'KEEPTTL')
  return false
end
if not removed then
  local mark = namespace_mark(ARGV[1], ARGV[2], LOG + 1)
  if type(mark) == 'table' then return mark end
  if not value or is_purged(value, mark) then
    if ARGV[3] == '0' then return -1 end
    value, left = false, UNKNOWN_TOMBSTONE_MILLISECONDS
  end
end
ttl = math.max(ttl, left, 1)
local failed = lasting and index_removal(ttl) or log_change(lasting and '~' or '-', LOG)
if failed then return failed end
redis.call('SET', KEYS[1], '', 'PX', string.format('%.0f', ttl))
if removed then return false end
return value and 1 or 0
