//! Generates the stubs of the contract: `stubs DESCRIPTORS DIRECTORY`. The descriptors are what `buf build` writes, so that no protoc
//! is needed.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(descriptors), Some(directory)) = (arguments.next(), arguments.next()) else {
        return Err("usage: stubs DESCRIPTORS DIRECTORY".into());
    };
    let set = prost_types::FileDescriptorSet::decode(std::fs::read(descriptors)?.as_slice())?;
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .include_file("mod.rs")
        .out_dir(directory)
        .compile_fds(set)?;
    Ok(())
}
