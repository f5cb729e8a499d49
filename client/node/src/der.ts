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
  return encode([{ tag, content }]);
}

/** Returns the bytes of elements, one after the other. */
export function encode(elements: readonly Element[]): Buffer {
  let total = 0;
  for (const { content } of elements) total += 2 + lengthSize(content.length) + content.length;
  const bytes = Buffer.allocUnsafe(total);
  let at = 0;
  for (const { tag, content } of elements) {
    const size = lengthSize(content.length);
    bytes[at++] = tag;
    bytes[at++] = size ? 0x80 + size : content.length;
    if (size) at = bytes.writeUIntBE(content.length, at, size);
    at += content.copy(bytes, at);
  }
  return bytes;
}

/** The bytes of a length behind the first one, which has those below 0x80 itself. */
function lengthSize(length: number): number {
  return length < 0x80 ? 0 : length < 0x100 ? 1 : length < 0x10000 ? 2 : 3;
}
