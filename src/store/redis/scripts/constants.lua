-- Shared by the scripts that acquire and release. Before it comes single.lua or cluster.lua, with
-- is_subscribed(), notify() and reserve().
--
-- KEYS: 1 lease, 2 queue (sorted set of owner tags, scored by the counter at enqueue, plus a half
-- if the inbox was not subscribed here), 3 counter of the slot.

-- The lease while shared leases and permits have the key: see modes.lua. No manager and no other
-- library writes this value.
local MARKER = '~shared'

-- A manager whose inbox is not subscribed on this server polls every quarter of a second instead.
-- When its turn comes, the lease is held for its next request for at most this many milliseconds.
local UNNOTIFIED_LEASE = 1000

-- If all waiters die, their queue outlives the lease by this many milliseconds.
local QUEUE_GRACE = 60000

