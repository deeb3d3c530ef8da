//! A proxy that understands RESP2 and decides for each command whether it reaches the server. It
//! imitates cluster proxies and proxies that support few commands.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// What to do with a command.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Verdict {
    /// Pass it on.
    Pass,
    /// Reply with this error.
    Refuse(&'static str),
    /// Close the connection.
    HangUp,
    /// Pass it on, and close the connection in place of its reply.
    LoseReply,
}

/// The proxy. Its connection threads end with their connections, and its accepting thread ends when
/// the value is dropped.
pub struct Filter {
    address: SocketAddr,
    stopped: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

type Judge = dyn Fn(&[Vec<u8>]) -> Verdict + Send + Sync;

impl Filter {
    /// Starts a proxy in front of the server at `address`.
    #[track_caller]
    pub fn start(server: String, judge: impl Fn(&[Vec<u8>]) -> Verdict + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (stopped, over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let judge: Arc<Judge> = Arc::new(judge);
        thread::spawn({
            let (stopped, over) = (Arc::clone(&stopped), Arc::clone(&over));
            move || {
                for client in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    let (server, judge, stopped) = (server.clone(), Arc::clone(&judge), Arc::clone(&stopped));
                    // Ignore errors: when a connection breaks, both sides are closed.
                    thread::spawn(move || drop(client.and_then(|client| serve(&client, &server, &*judge, &stopped))));
                }
            }
        });
        Self { address, stopped, over }
    }

    /// `127.0.0.1:<port>`
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Number of commands that were not passed on.
    pub fn stopped(&self) -> u64 {
        self.stopped.load(Ordering::Relaxed)
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, which may have ended already.
        drop(TcpStream::connect(self.address));
    }
}

/// Whether the keys of a script call belong to more than one slot.
pub fn is_of_several_slots(command: &[Vec<u8>]) -> bool {
    if !command[0].eq_ignore_ascii_case(b"EVAL") && !command[0].eq_ignore_ascii_case(b"EVALSHA") {
        return false;
    }
    let count: usize = String::from_utf8_lossy(&command[2]).parse().expect("a number of keys");
    let slots = command[3..3 + count]
        .iter()
        .map(|key| crc16::State::<crc16::XMODEM>::calculate(tag(key)) % 16_384);
    let mut slots: Vec<_> = slots.collect();
    slots.dedup();
    slots.len() > 1
}

fn tag(key: &[u8]) -> &[u8] {
    let tagged = key.iter().position(|&byte| byte == b'{').and_then(|start| {
        let rest = &key[start + 1..];
        let end = rest.iter().position(|&byte| byte == b'}')?;
        (end > 0).then(|| &rest[..end])
    });
    tagged.unwrap_or(key)
}

fn serve(client: &TcpStream, server: &str, judge: &Judge, stopped: &AtomicU64) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    let served = exchange(client, &server, judge, stopped);
    for stream in [client, &server] {
        // The other side may have closed it already.
        drop(stream.shutdown(Shutdown::Both));
    }
    served
}

fn exchange(client: &TcpStream, server: &TcpStream, judge: &Judge, stopped: &AtomicU64) -> io::Result<()> {
    for stream in [client, server] {
        stream.set_nodelay(true)?;
    }
    let (mut commands, mut replies) = (BufReader::new(client), BufReader::new(server));
    let (mut to_client, mut to_server) = (client, server);
    loop {
        let (mut raw, mut words) = (Vec::new(), Vec::new());
        read_value(&mut commands, &mut raw, &mut words)?;
        if raw[0] != b'*' {
            // An inline command. A blank line is not a command.
            words = raw.split(u8::is_ascii_whitespace).map(<[u8]>::to_vec).collect();
            words.retain(|word| !word.is_empty());
            if words.is_empty() {
                continue;
            }
        }
        let verdict = judge(&words);
        match verdict {
            Verdict::Pass | Verdict::LoseReply => {}
            Verdict::Refuse(error) => {
                stopped.fetch_add(1, Ordering::Relaxed);
                to_client.write_all(format!("-{error}\r\n").as_bytes())?;
                continue;
            }
            Verdict::HangUp => {
                stopped.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
        }
        to_server.write_all(&raw)?;
        if words[0].eq_ignore_ascii_case(b"SUBSCRIBE") {
            // From now on the server pushes messages, and the client sends nothing more.
            io::copy(&mut replies, &mut to_client)?;
            return Ok(());
        }
        raw.clear();
        read_value(&mut replies, &mut raw, &mut Vec::new())?;
        if verdict == Verdict::LoseReply {
            return Ok(());
        }
        to_client.write_all(&raw)?;
    }
}

/// Reads one value: its raw bytes, and the strings in it.
fn read_value(from: &mut impl BufRead, raw: &mut Vec<u8>, words: &mut Vec<Vec<u8>>) -> io::Result<()> {
    let start = raw.len();
    if from.read_until(b'\n', raw)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let number = || {
        String::from_utf8_lossy(&raw[start + 1..])
            .trim()
            .parse::<i64>()
            .unwrap_or(0)
    };
    match raw[start] {
        b'*' | b'>' | b'~' => (0..number()).try_for_each(|_| read_value(from, raw, words)),
        b'%' => (0..2 * number()).try_for_each(|_| read_value(from, raw, words)),
        b'$' if number() >= 0 => {
            let mut bytes = vec![0; usize::try_from(number()).expect("a length") + 2];
            from.read_exact(&mut bytes)?;
            raw.extend_from_slice(&bytes);
            bytes.truncate(bytes.len() - 2);
            words.push(bytes);
            Ok(())
        }
        _ => Ok(()),
    }
}
