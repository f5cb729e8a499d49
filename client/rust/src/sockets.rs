//! The sockets to the store, which a forked child closes: the connections on them are its parent's.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicI32, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// How many sockets are recorded: more than one process has to all servers of its stores. A child keeps any beyond that.
const RECORDED: usize = 256;
const NONE: i32 = -1;

/// The descriptors of this process' sockets. No lock, since another thread may hold any lock during a fork.
static SOCKETS: [AtomicI32; RECORDED] = [const { AtomicI32::new(NONE) }; RECORDED];

/// A stream on a socket that is recorded.
pub(crate) struct Recorded<S> {
    /// Dropped before the stream, so that no number is recorded that another file may have got.
    _record: Record,
    stream: S,
}

struct Record(Option<&'static AtomicI32>);

impl<S: AsFd> Recorded<S> {
    pub(crate) fn new(stream: S) -> Self {
        let descriptor = stream.as_fd().as_raw_fd();
        let free = |slot: &&AtomicI32| slot.compare_exchange(NONE, descriptor, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        Self { _record: Record(SOCKETS.iter().find(free)), stream }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.store(NONE, Ordering::Relaxed);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Recorded<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Recorded<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Closes the sockets of the parent in a forked child, so that its connections to the store end when it does. For bindings: to be called
/// by a handler of `pthread_atfork`, before the child opens any file. It allocates nothing and takes no lock.
pub fn close_inherited_sockets() {
    for slot in &SOCKETS {
        let descriptor = slot.swap(NONE, Ordering::Relaxed);
        if descriptor != NONE {
            let _ = nix::unistd::close(descriptor);
        }
    }
}
