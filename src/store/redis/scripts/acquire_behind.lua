-- The next part of the acquire script: a cycle that must wait, as is usual for a busy key. It comes
-- before the functions that only other requests need, since defining them costs time.
if owner and owner ~= MARKER and ARGV[5] ~= 'try' then
  return enqueue_behind(owner, ARGV[1], tonumber(ARGV[4]), ARGV[6], ARGV[7], ARGV[5] == 'known')
end

