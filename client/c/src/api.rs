//! The functions of `include/resumed.h`.

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint};
use std::fmt::Write;
use std::mem::{MaybeUninit, offset_of, size_of};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::ptr;
use std::slice;
use std::time::Duration;

use store::RemovalReason;

use crate::install::install;
use crate::logger::start_logging;
use crate::policy::{Binding, Policy, Verified};
use crate::settings::{Settings, shim};
use crate::ssl::{Connection, Context, ffi};
use crate::statistics::counts;

thread_local! {
    static COMPLAINT: RefCell<CString> = RefCell::default();
}

/// As in `resumed.h`.
#[repr(C)]
struct Options {
    size: usize,
    target: *const c_char,
    namespace: *const c_char,
    keyring: *const c_char,
    lifetime_seconds: c_uint,
    deadline_ms: c_uint,
    max_lookups: c_uint,
    mirror_bytes: usize,
    single_use: c_int,
    any_ids: c_int,
    wait_for_puts: c_int,
    tls: c_int,
    ca: *const c_char,
    cert: *const c_char,
    key: *const c_char,
    server_name: *const c_char,
    ignore_id_context: c_int,
    single_host: c_int,
    tickets: c_int,
    tickets_tls12: c_int,
    rotation_seconds: c_uint,
    revocation_grace_seconds: c_int,
}

/// The fields that every version of the header has had.
const LEAST_SIZE: usize = offset_of!(Options, lifetime_seconds);
/// A larger `size` was never set: a header of the future has far fewer fields.
const LARGEST_SIZE: usize = 4096;

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_install(context: *mut ffi::SSL_CTX, options: *const Options) -> *const c_char {
    start_logging();
    // SAFETY: the caller's.
    let outcome = catch_unwind(|| unsafe { installed(context, options) });
    match outcome.unwrap_or_else(|_| Err("a defect: please report it".to_owned())) {
        Ok(()) => ptr::null(),
        Err(complaint) => COMPLAINT.with_borrow_mut(|kept| {
            *kept = CString::new(complaint).unwrap_or_default();
            kept.as_ptr()
        }),
    }
}

unsafe fn installed(context: *mut ffi::SSL_CTX, options: *const Options) -> Result<(), String> {
    // SAFETY: the caller's.
    let (context, options) = unsafe { (Context::new(context).ok_or("context is NULL")?, read_options(options)?) };
    if context.binding().is_some() {
        return Err("this context has sessions in the store already".to_owned());
    }
    // SAFETY: the caller's.
    let text = |pointer, name| unsafe { text(pointer, name) };
    let required = |pointer, name| text(pointer, name)?.ok_or_else(|| format!("{name} is missing"));
    let (cert, key) = (text(options.cert, "cert")?, text(options.key, "key")?);
    if cert.is_some() != key.is_some() {
        return Err("cert and key go together: give both, or neither".to_owned());
    }
    let settings = Settings {
        target: required(options.target, "target")?,
        namespace: required(options.namespace, "namespace_")?,
        keyring: required(options.keyring, "keyring")?.into(),
        lifetime: Duration::from_secs(options.lifetime_seconds.into()),
        deadline: Duration::from_millis(options.deadline_ms.into()),
        max_lookups: options.max_lookups as usize,
        mirror: options.mirror_bytes,
        single_use: options.single_use != 0,
        any_ids: options.any_ids != 0,
        wait_for_puts: options.wait_for_puts != 0,
        tls: options.tls != 0,
        ca: text(options.ca, "ca")?.map(PathBuf::from),
        identity: cert.zip(key).map(|(cert, key)| (cert.into(), key.into())),
        server_name: text(options.server_name, "server_name")?,
        tickets: options.tickets != 0,
        tickets_tls12: options.tickets_tls12 != 0,
        rotation: Duration::from_secs(options.rotation_seconds.into()),
        revocation_grace: match options.revocation_grace_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.try_into().unwrap_or(0))),
        },
    };
    let shim = shim(&settings).map_err(|error| error.to_string())?;
    shim.begin_tickets();
    let policy = Policy {
        lifetime: shim.options().lifetime,
        shim,
        verified: Verified::Together,
        ignore_id_context: options.ignore_id_context != 0,
        single_host: options.single_host != 0,
    };
    install(&context, policy).map_err(str::to_owned)
}

/// Reads the options of a program that was built with this header, an older or a newer one. Fields that an older header does not have are
/// zero; those that this library does not know must be.
///
/// # Safety
///
/// It points to as many bytes as its first field says, or is NULL.
unsafe fn read_options(options: *const Options) -> Result<Options, &'static str> {
    if options.is_null() {
        return Err("options is NULL");
    }
    let mut known = MaybeUninit::<Options>::zeroed();
    // SAFETY: the caller's; zeroes are valid for all fields.
    unsafe {
        let size = (&raw const (*options).size).read();
        if !(LEAST_SIZE..=LARGEST_SIZE).contains(&size) {
            return Err("options.size must be sizeof(resumed_options)");
        }
        let given = slice::from_raw_parts(options.cast::<u8>(), size);
        let (read, unknown) = given.split_at(size.min(size_of::<Options>()));
        if unknown.iter().any(|byte| *byte != 0) {
            return Err("options has fields that this library does not know: the header is newer than the library");
        }
        ptr::copy_nonoverlapping(read.as_ptr(), known.as_mut_ptr().cast::<u8>(), read.len());
        Ok(known.assume_init())
    }
}

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_remove(context: *mut ffi::SSL_CTX, id: *const c_uchar, length: usize) {
    // SAFETY: the caller's.
    let bound = unsafe { binding(context) };
    if let Some(binding) = bound.filter(|_| !id.is_null()) {
        // SAFETY: the caller's.
        let id = unsafe { slice::from_raw_parts(id, length) };
        let _ = catch_unwind(AssertUnwindSafe(|| binding.shim().remove(id, RemovalReason::Application)));
    }
}

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_remove_connection(connection: *mut ffi::SSL) {
    // SAFETY: the caller's.
    let connection = unsafe { Connection::new(connection) };
    if let Some((connection, binding)) = connection.and_then(|connection| Some((connection, connection.binding()?))) {
        let _ = catch_unwind(AssertUnwindSafe(|| binding.remove(connection)));
    }
}

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_flush(context: *mut ffi::SSL_CTX, milliseconds: c_uint) -> c_int {
    // SAFETY: the caller's.
    let Some(binding) = (unsafe { binding(context) }) else { return 1 };
    let patience = Duration::from_millis(milliseconds.into());
    catch_unwind(AssertUnwindSafe(|| binding.shim().flush(patience))).map_or(0, c_int::from)
}

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_stats(context: *mut ffi::SSL_CTX, text: *mut c_char, size: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { write_text(context, text, size, stats) }
}

/// # Safety
///
/// As `resumed.h` says.
#[unsafe(no_mangle)]
unsafe extern "C" fn resumed_metrics(context: *mut ffi::SSL_CTX, text: *mut c_char, size: usize) -> usize {
    // SAFETY: the caller's.
    unsafe { write_text(context, text, size, |binding| store::metrics([binding.shim()])) }
}

/// # Safety
///
/// `context` is one, and there are `size` bytes at `text`.
unsafe fn write_text(
    context: *mut ffi::SSL_CTX,
    text: *mut c_char,
    size: usize,
    describe: impl FnOnce(&Binding) -> String,
) -> usize {
    // SAFETY: the caller's.
    let bound = unsafe { binding(context) };
    let written = bound.and_then(|binding| catch_unwind(AssertUnwindSafe(|| describe(binding))).ok()).unwrap_or_default();
    if size > 0 && !text.is_null() {
        let length = written.len().min(size - 1);
        // SAFETY: the caller's: there are `size` bytes.
        unsafe {
            ptr::copy_nonoverlapping(written.as_ptr(), text.cast(), length);
            *text.add(length) = 0;
        }
    }
    written.len()
}

fn stats(binding: &Binding) -> String {
    let mut text = String::new();
    for (kind, counts) in counts(binding.shim()) {
        for (reason, count) in counts {
            let _ = writeln!(text, "{kind} {reason} {count}"); // a String takes everything
        }
    }
    text
}

/// # Safety
///
/// It points to a context that lives for `'a`, or is NULL.
unsafe fn binding<'a>(context: *mut ffi::SSL_CTX) -> Option<&'a Binding> {
    // SAFETY: the caller's.
    unsafe { Context::new(context) }?.binding()
}

/// # Safety
///
/// It points to a string with a NUL, or is NULL.
unsafe fn text(pointer: *const c_char, name: &str) -> Result<Option<String>, String> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(|text| Some(text.to_owned())).map_err(|_| format!("{name} is not UTF-8"))
}
