-- The index of lasting removals: beside each stream and for each namespace a sorted set, whose members are the keys of
-- sessions and whose scores are the ends of their removals in milliseconds. A namespace has no '~' in its name. Any stream
-- of a node may have a removal, and several may: the latest end counts. The set expires with its last member.
local TRIMMED_ON_WRITE = 8

local function removals_of(stream, namespace) return stream .. '~' .. namespace end

local function milliseconds()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Delete up to `limit` removals that are over.
local function trim_removals(removals, limit)
  local over = redis.call('ZRANGE', removals, '-inf', string.format('%.0f', milliseconds()), 'BYSCORE', 'LIMIT', 0, limit)
  if #over > 0 then redis.call('ZREM', removals, unpack(over)) end
end

-- Add a removal for `ttl` milliseconds. Return an error (a table) if the set is not on this node.
local function add_removal(removals, key, ttl)
  local added = redis.pcall('ZADD', removals, 'GT', string.format('%.0f', milliseconds() + ttl), key)
  if type(added) == 'table' then return added end
  trim_removals(removals, TRIMMED_ON_WRITE)
  if redis.call('PTTL', removals) < ttl then redis.call('PEXPIRE', removals, string.format('%.0f', ttl)) end
end
