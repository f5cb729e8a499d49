//! Links OpenSSL, the one that the program has: both libraries are shared ones.

fn main() {
    println!("cargo:rustc-link-lib=dylib=ssl");
    println!("cargo:rustc-link-lib=dylib=crypto");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libresumed.so.0");
    println!("cargo:rerun-if-changed=build.rs");
}
