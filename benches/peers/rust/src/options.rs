//! The arguments, the same as for the other peers.

use std::time::Duration;

#[derive(Debug, Clone)]
pub struct Options {
    pub peer: String,
    pub server: String,
    pub process: usize,
    pub processes: usize,
    pub tasks: usize,
    pub keys: usize,
    pub hold: Duration,
    pub ttl: Duration,
    /// The longest delay between two tries; `None` for the library's own.
    pub retry_max: Option<Duration>,
    pub warmup: Duration,
    pub threads: usize,
}

impl Options {
    pub fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = Self {
            peer: String::new(),
            server: String::new(),
            process: 0,
            processes: 1,
            tasks: 1,
            keys: 1,
            hold: Duration::ZERO,
            ttl: Duration::from_secs(30),
            retry_max: None,
            warmup: Duration::from_secs(1),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        };
        while let Some(name) = args.next() {
            let value = args.next().ok_or_else(|| format!("{name} has no value"))?;
            let number = || value.parse::<u64>().map_err(|error| format!("{name} {value}: {error}"));
            match name.as_str() {
                "--peer" => options.peer.clone_from(&value),
                "--server" => options.server.clone_from(&value),
                "--process" => options.process = number()? as usize,
                "--processes" => options.processes = number()? as usize,
                "--tasks" => options.tasks = number()? as usize,
                "--keys" => options.keys = number()? as usize,
                "--hold-us" => options.hold = Duration::from_micros(number()?),
                "--ttl-ms" => options.ttl = Duration::from_millis(number()?),
                // The library draws its delay from zero upwards.
                "--retry-min-us" | "--pool" => drop(number()?),
                "--retry-max-us" => options.retry_max = Some(Duration::from_micros(number()?)).filter(|d| !d.is_zero()),
                "--threads" => options.threads = number()?.max(1) as usize,
                "--warmup-ms" => options.warmup = Duration::from_millis(number()?),
                _ => return Err(format!("unknown argument {name}")),
            }
        }
        Ok(options)
    }
}
