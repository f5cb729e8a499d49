-- The lineage of a stream: the replication id of this server, which changes with a restart or a failover, and the random
-- name of the stream's consumer group, which changes when the stream is made anew.
local replication = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
local function lineage(stream) return replication .. redis.call('XINFO', 'GROUPS', stream)[1][2] end
