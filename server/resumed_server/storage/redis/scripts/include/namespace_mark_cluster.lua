-- namespace_mark() for a cluster, each of whose primaries has copies of the mark of each namespace.
-- include marks.lua

-- Return the mark of a namespace, or an error (a table) if no copy is on this node. `known` is the mark, or '?' if the
-- caller does not know it. ARGV has the keys of streams from `first` on. Two copies are read where there are two, since
-- the slot of one may be about to move to another node.
local function namespace_mark(namespace, known, first)
  if known ~= '?' then return known end
  local mark, copies, failed = '', 0
  for each = first, #ARGV do
    local purge, state = redis.pcall('GET', ARGV[each] .. namespace), redis.pcall('GET', ARGV[each] .. '!')
    if type(purge) == 'table' or type(state) == 'table' then
      failed = type(purge) == 'table' and purge or state
    else
      copies = copies + 1
      mark = latest(mark, latest(state, purge))
      if copies == 2 then return mark end
    end
  end
  return copies > 0 and mark or failed
end
