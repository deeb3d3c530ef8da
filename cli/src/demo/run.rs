//! Runs the demo: the promotion and the calls of the partner, each without the lock and with it;
//! then the jobs.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Instant;

use deadpool_redis::Pool;
use deadpool_redis::redis::{cmd, pipe};
use futures_util::future::try_join_all;
use indicatif::{HumanCount, ProgressBar, ProgressFinish};
use shardlock::config::Endpoint;

use super::DemoArgs;
use super::partner::{self, CALLS_PER_TASK};
use super::protocol::{CallCounts, Command, JobCounts, KeyNames, LoadSettings, WorkerSettings};
use super::report::{Calls, Claims, Jobs, Partner, Report, rounded};
use super::setup::Setup;
use crate::load::connection::{connect, get};
use crate::load::progress::{bar, millis};
use crate::load::server_stats::ServerStats;

/// How many counters are read per request.
const COUNTERS_PER_READ: usize = 1000;

/// Runs the whole demo. `setup` records what is started, for the caller to remove.
pub(super) async fn run(args: &DemoArgs, setup: &mut Setup) -> anyhow::Result<Report> {
    setup.start_servers(args).await?;
    let shards = setup.shards();
    let data = try_join_all(setup.data().iter().map(|url| connect(url))).await?;
    for worker in 0..args.processes {
        let settings = WorkerSettings {
            shards: shards.clone(),
            data: setup.data(),
            prefix: setup.prefix().to_owned(),
            tasks: args.tasks,
            think: args.think,
            keys: args.keys,
            partner_limit: args.partner_limit,
            metrics: args.metrics.filter(|_| worker == 0),
            load: args.load.then(|| LoadSettings {
                owns_servers: setup.owns_servers(),
            }),
        };
        setup.workers.spawn(&settings).await?;
    }
    let metrics: Vec<SocketAddr> = setup.workers.wait_until_ready().await?;
    if let Some(file) = &args.targets {
        setup.publish(file, &metrics)?;
    }
    announce(args, &shards, &metrics)?;
    if args.load {
        return Err(run_load(args, setup).await);
    }

    let names = KeyNames::new(setup.prefix());
    let unlocked = promotion(args, setup, &names, &data[0], false).await?;
    let locked = promotion(args, setup, &names, &data[0], true).await?;
    let partner = match setup.has_permits() {
        true => Some(partner_calls(args, setup).await?),
        false => None,
    };
    let jobs = jobs(args, setup, &names, &data, shards.len()).await?;
    setup.workers.shut_down(&Command::Shutdown).await?;
    Ok(Report {
        processes: args.processes,
        tasks_per_process: args.tasks,
        coupons: args.coupons.into(),
        unlocked,
        locked,
        partner,
        jobs,
    })
}

fn announce(args: &DemoArgs, shards: &[String], metrics: &[SocketAddr]) -> anyhow::Result<()> {
    let locations = if args.shards.is_empty() {
        let (plain, quorum) = match (args.load, shards) {
            (true, [plain @ .., _]) => (plain.len(), " and a quorum"),
            _ => (shards.len(), ""),
        };
        format!("{plain} throw-away Redis servers{quorum}")
    } else {
        let endpoints: Result<Vec<_>, _> = shards.iter().map(|url| Endpoint::parse(url)).collect();
        endpoints?
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" and ")
    };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{} processes with {} tasks each, on {locations}",
        args.processes, args.tasks
    )?;
    if args.load {
        for (number, address) in (1..).zip(metrics) {
            writeln!(out, "metrics of process {number}: http://{address}/metrics")?;
        }
        writeln!(out, "the load runs until it is stopped, for example by Ctrl-C")?;
    } else if let Some(first) = metrics.first() {
        writeln!(
            out,
            "metrics of the first process, while it runs: http://{first}/metrics"
        )?;
    }
    Ok(out.flush()?)
}

/// Makes all workers keep up the load. Returns only on an error: a signal cancels it from outside.
async fn run_load(args: &DemoArgs, setup: &mut Setup) -> anyhow::Error {
    let bar = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
    let show = |locks| bar.set_message(format!("{} locks in {} processes", HumanCount(locks), args.processes));
    match setup.workers.run::<()>(&Command::Load, show).await {
        Ok(_) => anyhow::anyhow!("the workers have stopped the load on their own"),
        Err(error) => error,
    }
}

async fn promotion(
    args: &DemoArgs,
    setup: &mut Setup,
    names: &KeyNames,
    data: &Pool,
    locked: bool,
) -> anyhow::Result<Claims> {
    let (left_key, ledger_key) = (names.coupons_left(), names.ledger());
    pipe()
        .set(&left_key, args.coupons)
        .del(&ledger_key)
        .exec_async(&mut get(data).await?)
        .await?;

    let bar = bar(args.customers(), "{prefix} {bar:30} {pos}/{len} customers")?;
    bar.set_prefix(if locked { "with the lock   " } else { "without the lock" });
    let started = Instant::now();
    setup
        .workers
        .run::<()>(&Command::Claim { locked }, |customers| bar.set_position(customers))
        .await?;
    let took = started.elapsed();

    let mut data = get(data).await?;
    let left = cmd("GET").arg(&left_key).query_async(&mut data).await?;
    let mut read = cmd("LRANGE");
    let ledger: Vec<u64> = read.arg(&ledger_key).arg(0).arg(-1).query_async(&mut data).await?;
    let regressions = || ledger.windows(2).filter(|pair| pair[1] <= pair[0]).count() as u64;
    Ok(Claims {
        customers: args.customers(),
        claimed: ledger.len() as u64,
        left,
        token_regressions: locked.then(regressions),
        seconds: rounded(took.as_secs_f64()),
    })
}

async fn partner_calls(args: &DemoArgs, setup: &mut Setup) -> anyhow::Result<Partner> {
    Ok(Partner {
        limit: args.partner_limit,
        calls: args.customers() * u64::from(CALLS_PER_TASK),
        without_permits: calls(args, setup, false).await?,
        with_permits: calls(args, setup, true).await?,
    })
}

async fn calls(args: &DemoArgs, setup: &mut Setup, with_permits: bool) -> anyhow::Result<Calls> {
    let count = args.customers() * u64::from(CALLS_PER_TASK);
    let bar = bar(count, "{prefix} {bar:30} {pos}/{len} calls")?;
    bar.set_prefix(if with_permits {
        "with permits    "
    } else {
        "without permits "
    });
    let started = Instant::now();
    let command = Command::Call { with_permits };
    let counts: Vec<CallCounts> = setup.workers.run(&command, |calls| bar.set_position(calls)).await?;
    Ok(Calls {
        counts: partner::sum(counts),
        seconds: rounded(started.elapsed().as_secs_f64()),
    })
}

async fn jobs(
    args: &DemoArgs,
    setup: &mut Setup,
    names: &KeyNames,
    data: &[Pool],
    shards: usize,
) -> anyhow::Result<Jobs> {
    let servers_have_locks = setup.data() == setup.shards();
    let calls = async || -> anyhow::Result<Option<ServerStats>> {
        // Servers that only store the data do not see the lock's requests.
        if servers_have_locks {
            Ok(Some(ServerStats::of_all(data).await?))
        } else {
            Ok(None)
        }
    };
    let before = calls().await?;
    let bar = bar(millis(args.seconds), "jobs             {bar:30} {msg}")?;
    let started = Instant::now();
    let command = Command::Work { seconds: args.seconds };
    let show = |jobs| {
        bar.set_message(format!("{} done", HumanCount(jobs)));
        bar.set_position(millis(started.elapsed()));
    };
    let counts: Vec<JobCounts> = setup.workers.run(&command, show).await?;
    let took = started.elapsed();
    let calls = calls().await?.zip(before).map(|(after, before)| after.since(before));

    let mut counted = 0;
    // Each counter is on one server only; the others have no value under its name.
    for pool in data {
        counted += sum_of_counters(pool, names, args.keys as usize).await?;
    }
    Jobs::new((shards, args.keys), &counts, counted, calls, took)
}

async fn sum_of_counters(pool: &Pool, names: &KeyNames, keys: usize) -> anyhow::Result<u64> {
    let mut connection = get(pool).await?;
    let ranks: Vec<usize> = (1..=keys).collect();
    let mut sum = 0;
    for some in ranks.chunks(COUNTERS_PER_READ) {
        let mut read = pipe();
        for &rank in some {
            read.hget(names.job(rank), "done");
        }
        let counters: Vec<Option<u64>> = read.query_async(&mut connection).await?;
        sum += counters.into_iter().flatten().sum::<u64>();
    }
    Ok(sum)
}
