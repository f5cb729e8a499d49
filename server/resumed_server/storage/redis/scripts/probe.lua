#!lua flags=allow-oom
-- Write nothing, but be refused as scripts that write are: MISCONF, NOREPLICAS, READONLY. A full Redis refuses put.lua only.
-- KEYS: none. ARGV: none.
-- Returns: 1.
return 1
