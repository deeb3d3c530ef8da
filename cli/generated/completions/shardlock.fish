# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_shardlock_global_optspecs
    string join \n h/help V/version
end

function __fish_shardlock_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_shardlock_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_shardlock_using_subcommand
    set -l cmd (__fish_shardlock_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c shardlock -n "__fish_shardlock_needs_command" -s h -l help -d 'Print help'
complete -c shardlock -n "__fish_shardlock_needs_command" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "exec" -d 'Run a command while holding a lock'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "serve" -d 'Run an agent: one manager for all workers of this host, which talk to it in the Redis protocol'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "inspect" -d 'Show who holds a key and who waits for it'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "ls" -d 'List the held keys of all shards, with their holders and how many processes wait'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "break" -d 'End a lease and pass the key on to the next waiter'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "doctor" -d 'Check the configuration against the servers and report problems with how to fix them'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "top" -d 'Watch contention live: hot keys, held locks, shards, and the clients of agents'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "slot" -d 'Show the slot of a key and the shard that owns it'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "map" -d 'Show or replace the shard map that is stored on the servers'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "demo" -d 'Show on real servers what goes wrong without locks, that locks prevent it, and what they cost'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "bench" -d 'Measure the cost of locks: processes request them continuously, on given servers or on one started for the run'
complete -c shardlock -n "__fish_shardlock_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s k -l key -d 'The name of a lock; repeat the option to hold several locks at once' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l permits -d 'Hold W of at most N permits of the lock, such as 1/10, so that commands with a total of N run at a time' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s w -l timeout -d 'How long to wait for the lock, such as 500ms or 2s (a plain number is seconds), or none to wait forever' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l ttl -d 'How long the key stays locked if this machine dies [default: 10s]' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l max-hold -d 'How long the lock may be held before the command is ended, or none for no limit' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l min-hold -d 'How long the key stays locked after the lock was acquired, even if the command ends earlier or the tool is killed' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s E -l conflict-exit-code -d 'The exit code if the lock was not acquired: busy or timed out' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l kill-after -d 'How long to wait between TERM and KILL, up to a day' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l class -d 'The class label for this lock in metrics' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l agent -d 'Take the lock through the agent with this socket (`shardlock serve`) [default: $SHARDLOCK_AGENT, unless shards are given on the command line]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l agent-password-file -d 'A file with the password of the agent in its first line [default: $SHARDLOCK_AGENT_PASSWORD_FILE, or the password in $SHARDLOCK_AGENT_PASSWORD]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l textfile -d 'Report the end of this call in DIR/shardlock_exec_NAME.prom, for the textfile collector of node_exporter' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l textfile-name -d 'The NAME of that file [default: made from the keys]' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l metrics -d 'Serve Prometheus metrics on this address, such as 127.0.0.1:9187; port 0 picks a free port' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s n -l nonblock -d 'Fail instead of waiting if the lock is held or others are waiting for it'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l shared -d 'Hold the lock together with other shared holders; only exclusive ones are kept out'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s q -l quiet -d 'Print no message if the lock was not acquired'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -l inherit-password -d 'Keep passwords in the command\'s environment'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand exec" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l socket -d 'The path of the Unix socket [default: $SHARDLOCK_AGENT, or /run/shardlock/agent.sock]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l socket-mode -d 'The mode of the socket file; who may write to it may connect' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l socket-owner -d 'The owner of the socket file, such as shardlock:workers or :workers' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l listen -d 'Also listen on this TCP address; an address other than loopback needs --password-file' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l password-file -d 'A file whose first line is the password that clients must send with AUTH or HELLO' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l max-connections -d 'The most connections' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l max-locks -d 'The most locks that a connection may hold' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l max-request-bytes -d 'The longest request, and the most bytes that are read ahead while a LOCK waits' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l auth-timeout -d 'How long a connection may take to authenticate, if there is a password' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l drain -d 'How long to wait for the holders of locks after TERM, such as 20s' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l threads -d 'The number of threads; one serves tens of thousands of locks per second' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l metrics -d 'Serve Prometheus metrics on this address, such as 127.0.0.1:9187; port 0 picks a free port' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand serve" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand inspect" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l limit -d 'The maximum number of keys to list' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l scan -d 'About how many keys of a server may be searched, held or not' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand ls" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -l owner -d 'Whose lease to end, as `inspect` and `ls` show it' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand break" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand doctor" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l admin -d 'An admin endpoint, like ADDR; repeat the option for several' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l interval -d 'How long to wait between two samples' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l view -d 'The view to show first, or the only one with --once' -r -f -a "hot\t'The keys with the most contention'
held\t'The locks that are held, the oldest first'
shards\t'The shards'
clients\t'The clients of agents (`shardlock serve`)'"
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l key -d 'With shards: a key to show, whether in use or not; repeat it for several. Without it, the servers are searched for keys' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l scan -d 'With shards: how many keys of a server a search may scan, by SCAN; 0 for none [default: 10000]' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l once -d 'Print one frame of plain text and exit; the default if standard output is not a terminal'
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -l json -d 'With --once: print the frame as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand top" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand slot" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and not __fish_seen_subcommand_from show set help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and not __fish_seen_subcommand_from show set help" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and not __fish_seen_subcommand_from show set help" -f -a "show" -d 'Show what is stored, and what this configuration would store'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and not __fish_seen_subcommand_from show set help" -f -a "set" -d 'Replace the stored map with that of this configuration'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and not __fish_seen_subcommand_from show set help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from show" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l expect -d 'The map to replace, as `map show` prints it, with or without its here=...; "none" if none is stored; repeat it for several' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l force -d 'Replace it even though managers listen or hold leases; they lose all their locks on these shards at their next renewal'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from set" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from help" -f -a "show" -d 'Show what is stored, and what this configuration would store'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from help" -f -a "set" -d 'Replace the stored map with that of this configuration'
complete -c shardlock -n "__fish_shardlock_using_subcommand map; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l shard -d 'A running shard, by a URL of any kind except memory://; repeat it for several. Without it, three Redis servers are started and removed. The protected data is kept on the same servers if all are redis://, otherwise on one that is started for it' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l processes -d 'The number of worker processes' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l tasks -d 'The number of tasks per process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l coupons -d 'The number of coupons' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l think -d 'How long a customer thinks between reading what is left and writing one less' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l partner-limit -d 'How many calls at once the partner\'s API serves; it refuses more' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l seconds -d 'How many seconds the jobs run' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l keys -d 'The number of keys of the jobs' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l metrics -d 'Where the first worker process serves its metrics; by default a free port of 127.0.0.1' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l targets -d 'Write the metrics addresses of the workers to this file, for `file_sd_configs` of Prometheus. It is removed at the end' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l load -d 'Run a load of several classes of work until it is stopped, instead of the demo: for a dashboard, for `shardlock top`, or to try out faults. It has hot keys, timeouts, refusals and long holds on purpose. If no shard is given, a quorum of three further servers is one of its shards'
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -l json -d 'Also print the result as one line of JSON at the end'
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -s h -l help -d 'Print help'
complete -c shardlock -n "__fish_shardlock_using_subcommand demo" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l processes -d 'The number of processes' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l tasks -d 'The number of tasks per process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l keys -d 'The number of keys. If it equals the total number of tasks, each task has its own key; otherwise each lock is of a random key' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l hold -d 'How long a lock is held, such as 5ms. Timers add up to a millisecond; the result shows the measured time' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l duration -d 'How long to measure, after a warm-up' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l skew -d 'Lock some keys more often: the n-th with weight 1 / n to this power' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l shared -d 'The part of the locks that are shared, such as 0.95. The others are exclusive' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l permits -d 'Take a permit instead of a lock, of this many for each key' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l linger -d 'How long a process keeps a lease after its last guard is dropped if no one waits for the key, such as 1s. Without it, the configuration decides' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l plot -d 'Write the distribution of the waits to this file, as SVG' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l shard -d 'A shard; repeat for several, in the same order in every process' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l config -d 'The configuration file, in TOML [default: $SHARDLOCK_CONFIG]' -r -F
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l set -d 'Any other setting of the configuration file, such as store_timeout=5s; repeatable' -r
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l agent -d 'Start an agent (`shardlock serve`) for the run, and take the locks through it: each task has a connection of its own, and no process has a manager'
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -l json -d 'Print the result as one line of JSON'
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c shardlock -n "__fish_shardlock_using_subcommand bench" -s V -l version -d 'Print version'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "exec" -d 'Run a command while holding a lock'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "serve" -d 'Run an agent: one manager for all workers of this host, which talk to it in the Redis protocol'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "inspect" -d 'Show who holds a key and who waits for it'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "ls" -d 'List the held keys of all shards, with their holders and how many processes wait'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "break" -d 'End a lease and pass the key on to the next waiter'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "doctor" -d 'Check the configuration against the servers and report problems with how to fix them'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "top" -d 'Watch contention live: hot keys, held locks, shards, and the clients of agents'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "slot" -d 'Show the slot of a key and the shard that owns it'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "map" -d 'Show or replace the shard map that is stored on the servers'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "demo" -d 'Show on real servers what goes wrong without locks, that locks prevent it, and what they cost'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "bench" -d 'Measure the cost of locks: processes request them continuously, on given servers or on one started for the run'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and not __fish_seen_subcommand_from exec serve inspect ls break doctor top slot map demo bench help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and __fish_seen_subcommand_from map" -f -a "show" -d 'Show what is stored, and what this configuration would store'
complete -c shardlock -n "__fish_shardlock_using_subcommand help; and __fish_seen_subcommand_from map" -f -a "set" -d 'Replace the stored map with that of this configuration'
