-- Log a change of KEYS[1] if there is a log: '+' for a session that was stored, '-' for one that was removed or taken.
-- ARGV[first] is the length at which the log is trimmed, followed by the keys of streams; the first stream that this
-- node has is used. Return an error (a table) if the change could not be logged: then the script must change nothing.
local function log_change(what, first)
  for each = first + 1, #ARGV do
    local logged = redis.pcall('XADD', ARGV[each], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[first], '*', what, KEYS[1])
    if type(logged) ~= 'table' then return end
    if each == #ARGV then return logged end
  end
end
