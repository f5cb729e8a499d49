/** Reads the ClientHello of a connection before TLS does, and puts it back. */
import type { Duplex } from "node:stream";

import { readHello, type Hello } from "./hello.js";

/**
 * Resolves to the ClientHello with which a connection begins, or undefined if it begins otherwise or not within `patience`
 * milliseconds. All bytes that it read are in the stream again then; "gone" if the connection has ended.
 */
export function peek(stream: Duplex, patience: number): Promise<Hello | "gone" | undefined> {
  return new Promise((resolve) => {
    let bytes: Buffer = Buffer.alloc(0);
    const timer = setTimeout(finish, patience, undefined);
    stream.on("readable", read);
    stream.on("error", leave);
    stream.on("close", leave);
    stream.on("end", leave);

    function read(): void {
      const chunk = stream.read() as Buffer | null;
      if (!chunk) return;
      bytes = bytes.length > 0 ? Buffer.concat([bytes, chunk]) : chunk;
      const hello = readHello(bytes);
      if (hello !== "incomplete") finish(hello);
    }

    function leave(): void {
      stream.destroy();
      finish("gone");
    }

    function finish(hello: Hello | "gone" | undefined): void {
      clearTimeout(timer);
      stream.removeListener("readable", read);
      stream.removeListener("error", leave);
      stream.removeListener("close", leave);
      stream.removeListener("end", leave);
      if (hello !== "gone" && bytes.length > 0) stream.unshift(bytes);
      resolve(hello);
    }
  });
}
