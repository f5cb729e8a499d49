#!lua flags=allow-oom,allow-cross-slot-keys
-- Return where the streams of this node end. Make streams that are missing, prolong the life of all, and add a heartbeat
-- to a stream whose last id is older than a second, or ahead of the clock.
-- KEYS: the first stream.
-- ARGV: a random name for streams that are made, keys of streams.
-- Returns: {lineages, last ids}, each a text with blanks in between.
-- include lineage.lua
local HEARTBEAT_MILLISECONDS, KEPT_MILLISECONDS = 1000, 300000

local lineages, ends = {}, {}
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
for each = 2, #ARGV do
  local stream = ARGV[each]
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  if not last then
    redis.call('XGROUP', 'CREATE', stream, ARGV[1], '$', 'MKSTREAM')
    redis.call('XADD', stream, '0-1', '.', '')
  end
  local id = last and last[1]
  local age = last and now - string.match(id, '%d+')
  if not last or age < 0 or age > HEARTBEAT_MILLISECONDS then
    local oldest = string.format('%.0f', now - KEPT_MILLISECONDS)
    id = redis.call('XADD', stream, 'MINID', '~', oldest, '*', '.', '')
    redis.call('PEXPIRE', stream, KEPT_MILLISECONDS)
  end
  lineages[#lineages + 1] = lineage(stream)
  ends[#ends + 1] = id
end
return {table.concat(lineages, ' '), table.concat(ends, ' ')}
