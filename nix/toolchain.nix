# clang 19 for BPF and clang-format 19, under the names that Debian has for them. Not wrapped: the wrapper's flags are those of a host's program.
{ runCommand, llvmPackages_19 }:
runCommand "sidegate-bpf-toolchain" { } ''
  mkdir -p $out/bin
  ln -s ${llvmPackages_19.clang-unwrapped}/bin/clang $out/bin/clang-19
  ln -s ${llvmPackages_19.llvm}/bin/llvm-strip $out/bin/llvm-strip-19
  ln -s ${llvmPackages_19.clang-unwrapped}/bin/clang-format $out/bin/clang-format-19
''
