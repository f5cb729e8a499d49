/** As much of DER as sessions and certificates need: tags of one byte, lengths below 16 MiB. */

export const SEQUENCE = 0x30;
export const INTEGER = 0x02;
export const OCTET_STRING = 0x04;
export const OBJECT_IDENTIFIER = 0x06;

export interface Element {
  tag: number;
  content: Buffer;
}

/** Returns the DER elements that make up bytes, or undefined if they are none. */
export function elementsOf(bytes: Buffer): Element[] | undefined {
  const elements: Element[] = [];
  for (let at = 0; at < bytes.length;) {
    const [tag, first] = [bytes[at], bytes[at + 1]];
    if (tag === undefined || first === undefined) return undefined;
    at += 2;
    let length = first;
    if (first >= 0x80) {
      const size = first - 0x80;
      if (size < 1 || size > 3 || at + size > bytes.length) return undefined;
      length = bytes.readUIntBE(at, size);
      at += size;
    }
    if (at + length > bytes.length) return undefined;
    elements.push({ tag, content: bytes.subarray(at, at + length) });
    at += length;
  }
  return elements;
}

export function element(tag: number, content: Buffer): Buffer {
  const { length } = content;
  const size = length < 0x80 ? 0 : length < 0x100 ? 1 : length < 0x10000 ? 2 : 3;
  const head = Buffer.alloc(2 + size);
  head[0] = tag;
  head[1] = size ? 0x80 + size : length;
  if (size) head.writeUIntBE(length, 2, size);
  return Buffer.concat([head, content]);
}
