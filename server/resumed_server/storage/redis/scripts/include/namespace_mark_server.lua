-- namespace_mark() for a single server, which has one stream, and so one mark of each namespace.
-- include marks.lua

-- Return the mark of a namespace. ARGV[first] is the key of the stream. This runs in every call.
local function namespace_mark(namespace, known, first)
  return latest(redis.call('GET', ARGV[first] .. '!'), redis.call('GET', ARGV[first] .. namespace))
end
